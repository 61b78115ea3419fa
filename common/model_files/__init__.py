"""Find, download and check the files of pretrained models."""
