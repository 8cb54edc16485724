"""The demo's pictures, questions, vocabulary and starting weights; no data/, no models/."""
