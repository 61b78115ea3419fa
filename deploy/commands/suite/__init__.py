"""`ddpo evaluate --suite`: standard suites of prompts and scorers, with a table by category."""
