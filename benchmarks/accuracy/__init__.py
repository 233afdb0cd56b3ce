"""Accuracies of real runs on real data: one JSON per run, tables and plots of all."""
