"""Small pictures drawn by code, with questions about them: air quality, and general ones for the base."""
