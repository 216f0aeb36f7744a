"""Infrastructure that knows nothing of the domain: settings, database, object store, tracker, services, processes."""
