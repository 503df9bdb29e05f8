"""Does the model need a movement for a group of tokens, and for that group only?"""
