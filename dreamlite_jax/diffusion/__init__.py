"""Flow matching as pure functions over a velocity function: no network is known here."""
