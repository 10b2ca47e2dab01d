"""This process, its peers, the machine, the disk, the network. Imports only `UserError`."""
