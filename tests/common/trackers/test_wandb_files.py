"""wandb's files are read as wandb writes them, also where a kill has cut one off."""
