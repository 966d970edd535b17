"""The explorer: a local web server over recorded episodes, and the page that it serves.

`library` knows which episodes there are and when they grow, `payloads` turns an episode into JSON and binary
answers, `pictures` turns video frames into pictures, `app` routes requests to them, `server` runs it.
`document` makes the page one file, `export` puts an episode into it. Nothing here is imported by the rest of
the package but by the command line, and nothing here writes to a store.
"""
