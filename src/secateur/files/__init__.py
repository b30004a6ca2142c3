"""The disk: files read within limits, safetensors read and written tensor by tensor, renames that replace nothing."""
