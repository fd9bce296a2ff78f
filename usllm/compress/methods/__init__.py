"""Compression methods, one file each: an adapter that ends with its compressor class as ``COMPRESSOR``."""
