"""A run's folder, on a local disk or any filesystem of pyarrow."""
