"""The explorer: a local web server over recorded episodes, and the page that it serves.

`library` knows which episodes there are and when they grow. An episode becomes an answer in `facts` (what the
page must know of it), `tables` (rows per frame or inference), `slabs` (its attention), `means` (over the
executed actions), `ranges` (where its colours end), `neurons` (how active feed-forward neurons are), `groups`
(successes against failures) and `pictures` (frames of its videos); `values` is how JSON has a store's values.
`app` routes requests to them, `page_files` serves the page, `hosts` and `base_path` let it stand behind a
proxy, `server` runs it, `browser` opens it. `document` makes the page one file, `export` puts the `excerpt`
of an episode into it. Nothing here is imported by the rest of the package but by the command line, and
nothing here writes to a store.
"""
