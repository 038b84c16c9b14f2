"""Convolutions verified, timed and explained."""
