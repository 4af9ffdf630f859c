"""Model cards, and the upload to the Hub."""
