"""The numbers that the authors of 2015 saved, computed again by the exactly reversible engine."""
