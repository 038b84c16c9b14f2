"""Convolutions proved, timed and explained."""
