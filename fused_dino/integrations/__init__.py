"""Thin adapters to trainers, imported on demand only."""
