"""Runs of ordinary trainings, and what is told of them."""
