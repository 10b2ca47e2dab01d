"""From arguments to an exit status: one file a verb. Imports all other rooms."""
