"""What is written down of a result: its manifest, the check of it, its model card."""
