"""Folder, hub id, GGUF file or module, opened the same way."""
