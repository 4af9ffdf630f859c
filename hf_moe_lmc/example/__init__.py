"""The embedded default: small models, trained and taken through all verbs."""
