"""All-reduce in two levels, for groups that span hosts: inside each host first, then between the hosts.

shape.py     which ranks share a host, and who meets whom between the hosts; pure
probe.py     is there more than one host, and one with several ranks?
backend.py   CommBackend: forms the inner groups, opens, prepares, closes
ways.py      the data plane: the ways to reduce
losses.py    an error of an inner group as one of the whole group: who is gone
"""
