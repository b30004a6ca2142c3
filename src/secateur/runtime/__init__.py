"""Packed weights and what computes with them."""
