"""Run the command line: `python -m ray_ddpo train RECIPE`."""

from ray_ddpo.cli import command

if __name__ == "__main__":
    command()
