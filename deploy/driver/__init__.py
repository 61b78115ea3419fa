"""The driver's own files: components, workers, start, progress, supervision; its loop is `ray_ddpo/train.py`."""
