"""Everything that is a Ray Serve deployment, and the application that they form."""
