/** The messages and services of the contract, `roster.v1`. */
export * from "./roster/v1/bulk_pb.js";
export * from "./roster/v1/changes_pb.js";
export * from "./roster/v1/posts_pb.js";
export * from "./roster/v1/resources_pb.js";
export * from "./roster/v1/users_pb.js";
