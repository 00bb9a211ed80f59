"""From a run to a model directory, and from there to the phone."""
