"""One interface to run a graph, and the engines behind it. Imports no other folder of sld-edge."""
