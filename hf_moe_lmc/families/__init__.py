"""Data only: one file per group of model types, each calling `register`; `layouts` is what they share. No logic lives here."""
