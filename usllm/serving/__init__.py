"""Packed models in servers of others: one folder for each, imported by that server alone."""
