"""Pairs of videos, compared."""
