// UserService in Go as it is usually written: grpc-go, and pgx with its pool and its cache of prepared statements.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "example.org/peer/roster/v1"
)

const (
	connections = 20
	pageRows    = 50
	exportRows  = 1000
	columns     = "SELECT id, email, full_name, is_active, created_at, updated_at, version FROM users "
)

var copied = []string{"email", "hashed_password", "full_name", "is_active"}

type server struct {
	pb.UnimplementedUserServiceServer
	pool *pgxpool.Pool
}

func scan(row pgx.CollectableRow) (*pb.User, error) {
	var user pb.User
	var created, updated time.Time
	err := row.Scan(&user.Id, &user.Email, &user.FullName, &user.IsActive, &created, &updated, &user.Version)
	user.CreatedAt, user.UpdatedAt = timestamppb.New(created), timestamppb.New(updated)
	return &user, err
}

func (s *server) users(ctx context.Context, condition string, values ...any) ([]*pb.User, error) {
	rows, err := s.pool.Query(ctx, columns+condition, values...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, scan)
}

func (s *server) after(ctx context.Context, id int64, limit int32) ([]*pb.User, error) {
	return s.users(ctx, "WHERE id > $1 ORDER BY id LIMIT $2", id, limit)
}

func (s *server) GetUser(ctx context.Context, request *pb.GetUserRequest) (*pb.User, error) {
	condition, key := "WHERE id = $1", any(request.GetId())
	if email, ok := request.Key.(*pb.GetUserRequest_Email); ok {
		condition, key = "WHERE email = $1", email.Email
	}
	users, err := s.users(ctx, condition, key)
	if err != nil {
		return nil, err
	}
	if len(users) == 0 {
		return nil, status.Error(codes.NotFound, "no such user")
	}
	return users[0], nil
}

func (s *server) BatchGetUsers(ctx context.Context, request *pb.BatchGetUsersRequest) (*pb.BatchGetUsersResponse, error) {
	users, err := s.users(ctx, "WHERE id = ANY($1)", request.Ids)
	if err != nil {
		return nil, err
	}
	found := make(map[int64]*pb.User, len(users))
	for _, user := range users {
		found[user.Id] = user
	}
	response := &pb.BatchGetUsersResponse{Users: users[:0]}
	for _, id := range request.Ids {
		if user := found[id]; user != nil {
			response.Users = append(response.Users, user)
		} else {
			response.MissingIds = append(response.MissingIds, id)
		}
	}
	return response, nil
}

func (s *server) ListUsers(ctx context.Context, request *pb.ListUsersRequest) (*pb.ListUsersResponse, error) {
	size := request.PageSize
	if size == 0 {
		size = pageRows
	}
	var last int64
	if request.PageToken != "" {
		var err error
		if last, err = strconv.ParseInt(request.PageToken, 10, 64); err != nil {
			return nil, status.Error(codes.InvalidArgument, "not a page token")
		}
	}
	users, err := s.after(ctx, last, size+1)
	if err != nil {
		return nil, err
	}
	response := &pb.ListUsersResponse{Users: users}
	if len(users) > int(size) {
		response.Users = users[:size]
		response.NextPageToken = strconv.FormatInt(users[size-1].Id, 10)
	}
	return response, nil
}

func (s *server) BulkCreateUsers(stream pb.UserService_BulkCreateUsersServer) error {
	opened := &pb.BulkOpened{MaxRows: 5000, MaxBytes: 4 << 20}
	if err := stream.Send(&pb.BulkWriteResponse{Event: &pb.BulkWriteResponse_Opened{Opened: opened}}); err != nil {
		return err
	}
	var total int64
	for {
		request, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			summary := &pb.BulkSummary{NextOffset: total, Created: total, State: pb.BulkLoad_FINISHED}
			return stream.Send(&pb.BulkWriteResponse{Event: &pb.BulkWriteResponse_Summary{Summary: summary}})
		}
		if err != nil {
			return err
		}
		rows := pgx.CopyFromSlice(len(request.Users), func(i int) ([]any, error) {
			user := request.Users[i]
			return []any{user.Email, orNull(user.HashedPassword), user.FullName, user.IsActive == nil || *user.IsActive}, nil
		})
		created, err := s.pool.CopyFrom(stream.Context(), pgx.Identifier{"users"}, copied, rows)
		if err != nil {
			return err
		}
		ack := &pb.BulkAck{Offset: total, NextOffset: total + created, Created: int32(created)}
		total += created
		if err := stream.Send(&pb.BulkWriteResponse{Event: &pb.BulkWriteResponse_Ack{Ack: ack}}); err != nil {
			return err
		}
	}
}

func orNull(value string) *string {
	if value == "" {
		return nil
	}
	return &value
}

func (s *server) ExportUsers(request *pb.ExportUsersRequest, stream pb.UserService_ExportUsersServer) error {
	size, last := request.BatchSize, request.AfterId
	if size == 0 {
		size = exportRows
	}
	for {
		users, err := s.after(stream.Context(), last, size)
		if err != nil || len(users) == 0 {
			return err
		}
		last = users[len(users)-1].Id
		if err := stream.Send(&pb.ExportUsersResponse{Users: users, LastId: last}); err != nil {
			return err
		}
	}
}

func main() {
	config, err := pgxpool.ParseConfig(os.Getenv("DATABASE_URL"))
	if err != nil {
		log.Fatal(err)
	}
	config.MaxConns = connections
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	if err != nil {
		log.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	service := grpc.NewServer()
	pb.RegisterUserServiceServer(service, &server{pool: pool})
	fmt.Fprintln(os.Stderr, "listening on", listener.Addr())
	log.Fatal(service.Serve(listener))
}
