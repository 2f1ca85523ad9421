"""The home of blobs and artifacts, and the index from stage keys to them."""

from pipeline.store.store import StageRecord, Store, default_store_path

__all__ = ["StageRecord", "Store", "default_store_path"]
