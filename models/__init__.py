"""Conversion models: architectures, their registry, and trained models on disk."""

from models.saved import SavedModel, SavedModelError, load

__all__ = ["SavedModel", "SavedModelError", "load"]
