-- Gives the roles of roles.sql the passwords that are in psql's environment; psql 14 or newer.
\getenv migrator MIGRATOR_PASSWORD
\getenv service SERVICE_PASSWORD
ALTER ROLE roster_migrator PASSWORD :'migrator';
ALTER ROLE roster_service PASSWORD :'service';
