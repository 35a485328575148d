"""The verdict, the tables and the page of a set of runs."""
