"""Recording episodes, whatever loop drives them. Left of the store: nothing here reads one back."""
