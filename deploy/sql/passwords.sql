-- Sets the passwords of the roles from psql's environment variables. Needs psql 14 or newer.
\getenv migrator MIGRATOR_PASSWORD
\getenv service SERVICE_PASSWORD
ALTER ROLE roster_migrator PASSWORD :'migrator';
ALTER ROLE roster_service PASSWORD :'service';
