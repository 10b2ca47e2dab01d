"""From arguments to an exit status: one file a verb. Imports all other rooms.

A verb reads its arguments before it imports anything large, so that a mistake is answered at once:
hence the imports inside functions.
"""
