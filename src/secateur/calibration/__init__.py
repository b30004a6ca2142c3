"""Calibration and evaluation text: corpora, and the token windows cut from them."""
