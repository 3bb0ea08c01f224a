"""One interface to run a graph, and what implements it. Imports nothing else of ours."""
