"""Run folders in, paper figures out."""
