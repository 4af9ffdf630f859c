"""Data only: one file per group of model types, each calling `register`. No logic lives here."""
