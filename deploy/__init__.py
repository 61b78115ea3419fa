"""The driver, the commands of `ddpo`, evaluation during training, and files for clusters."""
