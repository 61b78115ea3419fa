"""Fit an aesthetic head on rated images: tables, splits, embeddings, fit, and agreement of ratings."""
