"""Corpora that are read while they are trained on: shards, their documents in order, and sequences made of them.

``shards`` finds files, ``rows`` reads one, ``order`` puts documents into the order of training, ``lanes`` tokenises and
packs them, ``loader`` hands sequences to the ranks.
"""
