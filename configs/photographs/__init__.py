"""The first stages on a folder of photographs of one's own, at 64 px."""
