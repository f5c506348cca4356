"""The command line: ``main`` is what a user calls, ``worker`` runs in the processes that ``plan`` launches."""
