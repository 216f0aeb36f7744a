"""Services and machinery without domain words: settings, database, objects, tracker, services, processes."""
