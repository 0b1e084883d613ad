package roster

import (
	"context"
	"iter"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Pages iterates over the rows of all pages of a List call, and gets each page when it is needed. An error ends the
// iteration. The last argument returns the rows of a page:
//
//	request := &rosterv1.ListUsersRequest{Filter: "is_active = true"}
//	for user, err := range roster.Pages(ctx, client.Users.ListUsers, request, (*rosterv1.ListUsersResponse).GetUsers)
func Pages[Request proto.Message, Page interface{ GetNextPageToken() string }, Row any](
	ctx context.Context,
	list func(context.Context, Request, ...grpc.CallOption) (Page, error),
	request Request,
	rows func(Page) []Row,
) iter.Seq2[Row, error] {
	return func(yield func(Row, error) bool) {
		next := proto.CloneOf(request)
		token := next.ProtoReflect().Descriptor().Fields().ByName("page_token")
		for {
			page, err := list(ctx, next)
			if err != nil {
				var none Row
				yield(none, err)
				return
			}
			for _, row := range rows(page) {
				if !yield(row, nil) {
					return
				}
			}
			if page.GetNextPageToken() == "" {
				return
			}
			next.ProtoReflect().Set(token, protoreflect.ValueOfString(page.GetNextPageToken()))
		}
	}
}
