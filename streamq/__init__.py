"""streamq quantizes Wan video transformers one piece at a time, straight from disk to disk."""

__version__ = "0.1.0"
